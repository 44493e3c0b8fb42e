"""Samples: their schema, sources, shards, order, composition and stream."""
