"""A class behind the older kind of HTTP server, which the control plane refuses."""

import modal
import modal.experimental

app = modal.App("t-experimental-server")


@app.cls()
@modal.experimental.http_server(port=8000, proxy_regions=["us-east"])
class Site:
    @modal.enter()
    def start(self):
        raise NotImplementedError
