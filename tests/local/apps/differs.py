"""An app with things that are not here as in the cloud."""

import modal

app = modal.App("t-differs")


@app.server(port=8000, routing_region="us-east", gpu=["H100:2", "A100-80GB"], max_containers=1)
class Served:
    @modal.enter()
    def start(self):
        raise NotImplementedError
