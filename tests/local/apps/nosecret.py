"""An app that needs a secret that nobody made."""

import modal

app = modal.App("t-nosecret")


@app.function(secrets=[modal.Secret.from_name("not-there")])
def needs():
    raise NotImplementedError
