"""OpenAI's words: its requests checked and turned into ours, our tokens turned into its replies.

Nothing here knows HTTP's server or Ray; :mod:`rayapp.api.routes` puts it behind routes.
"""
