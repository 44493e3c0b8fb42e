"""What stays up: the HTTP ingress, the engine replicas behind it, the page, and the client.

A request's way: `ingress` (HTTP, schemas, limits) → `backend` (one call to a replica: deadline, retry, cancellation) →
`protocol` (the few bytes that cross) → `replica` (one engine, weights loaded once) → back, where `mask_formats` and
`chat` shape the answer. `app.deploy` puts all of it on Ray Serve.
"""
