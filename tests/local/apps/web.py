"""A web function, which the control plane refuses."""

import modal

app = modal.App("t-web")


@app.function()
@modal.asgi_app()
def site():
    raise NotImplementedError
