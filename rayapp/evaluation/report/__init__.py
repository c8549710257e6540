"""One self-contained HTML page that shows everything known about a plan.

``findings`` gathers the files that lie beside a plan, ``charts`` and ``plots`` draw them, ``page``
puts them into the templates. Invariant: the page measures nothing and needs no network.
"""
