"""Batch prediction: one question about millions of pictures, with as many engine actors as there is room for."""
