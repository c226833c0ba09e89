"""Replicas behind one address with Ray Serve; docs/ray-serve.md tells how they are run.

Only ``deployment`` and ``request_router`` import ray, and ``launch`` as it runs. The rest is plain ASGI and arithmetic:

  launch             ``saccade ray``: the environment of Ray's processes, Ray, the config file
  proxy_middleware   in Ray's HTTP proxy: reads the body, names the request's beginnings, keeps our errors ours
    prefix_keys      names of a request's beginnings
    exchange         one request's messages, with an account of what the client has read
  request_router     in the same process: chooses a replica
    affinity         by who has seen such a beginning, and who has room
  deployment         what a replica is: an engine process and the application of ``saccade serve``
    replica_settings its flags
    replica_app      around that application: who answered, and no more under way than the client reads
    operations       its own /metrics, on a port of its own
"""
