"""Start or join Ray, place replicas, pools, weight sync, durable store: the mechanism, which knows nothing of alignment."""
