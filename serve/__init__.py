"""Who faces outward: the console, the report, jobs on a cluster, the endpoint that serves the learner."""
