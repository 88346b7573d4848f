"""The local Modal control plane: Modal's API on this machine, for the real `modal` client. Imports gpuctl.errors only.

It knows nothing of gpuctl's specs or templates: it serves any Modal app, and could be a package of its own.

Read it in this order. `daemon` wires everything; `service` dispatches each RPC to the one handler that carries its
name (`wire.rpc`); then one module per Modal noun: `environments`, `apps`, `functions`, `servers` (and `router`, their
HTTP side), `tasks` (containers as the API sees them), `image_rpcs` (with `builders`), `mounts`, `blobs`, `volumes`,
`secrets`, `dicts` and `queues` (with `named` and `items`), `command_router`, `proxy_tokens`, `logs`. `store` holds
the SQL. `containers`, `sandbox`, `container_init`, `egress` and `images` run the containers. `client` is what the
rest of gpuctl uses: it starts, finds and stops the plane.
"""
