"""One self-contained HTML page that shows all that is known of a plan.

``findings`` gathers the files that lie beside a plan, ``charts`` and ``plots`` draw them, ``page``
puts them into the templates. Invariant: the page measures nothing and needs no network.
"""
