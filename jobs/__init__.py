"""What runs to completion: prepare, train, evaluate, predict, promote, submit."""
