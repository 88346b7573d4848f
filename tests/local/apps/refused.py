"""What the control plane refuses, by T_WHAT: a web method, a bucket's mount, a cluster."""

import os

import modal

app = modal.App("t-refused")
what = os.environ["T_WHAT"]

if what == "web method":

    @app.cls()
    class Site:
        @modal.method()
        def works(self):
            raise NotImplementedError

        @modal.fastapi_endpoint()
        def answers(self):
            raise NotImplementedError

elif what == "bucket":

    @app.function(volumes={"/data": modal.CloudBucketMount("some-bucket")})
    def reads():
        raise NotImplementedError

else:

    @app.function(gpu="H100:8")
    @modal.clustered(size=2)
    def trains():
        raise NotImplementedError
