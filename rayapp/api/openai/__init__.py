"""OpenAI's interface: its requests become ours, and our tokens become its replies.

Nothing here knows HTTP's server or Ray; :mod:`rayapp.api.routes` puts it behind routes.
"""
