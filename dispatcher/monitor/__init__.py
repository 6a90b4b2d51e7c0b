"""The yard for people and for Prometheus: a web page, what it shows as JSON, and /metrics. It only reads."""
