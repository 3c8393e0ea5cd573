"""The cluster's bus: one-way messages, requests with answers, and publications."""
