"""Talks to the Hub: publishes a dataset to its own branch, lists it on main, and reads it back.

client.py      calls the Hub: retries transient errors, and turns the others into messages with a way out
publish.py     publishes a finished folder to a branch, in one commit
catalogue.py   maintains the list of branches on main
branch.py      fetches the files of a branch as they are needed
revisions.py   finds the commit of a revision
"""
