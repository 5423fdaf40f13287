"""Who faces outward: the report and, later, the endpoint and the review page."""
