"""Seconds and bytes of one request on both sides of a link, and what a plan gains on any link."""
