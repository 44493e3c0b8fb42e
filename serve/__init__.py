"""What stays up: the Ray Serve application, its replicas, the page and the client."""
