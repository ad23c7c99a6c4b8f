"""The HTTP API: routes, bodies, what goes over the wire."""
