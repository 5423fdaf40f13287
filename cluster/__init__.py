"""Start or join Ray, place replicas, pools, weight sync, durable store: mechanism that knows nothing of alignment."""
