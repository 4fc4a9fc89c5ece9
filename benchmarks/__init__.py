"""The cost of the proxy beside the proxies that a user would pick instead. See benchmarks/README.md.

Not part of the installed package.
"""
