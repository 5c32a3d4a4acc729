"""Callbacks for libraries that train models. Importing neq imports none of these libraries."""
