"""The Hub: a dataset is published to a branch of its own, listed on main, and read back from there.

client.py      how the Hub is asked: what is tried again, and what an error says
publish.py     a finished folder becomes what a branch holds, in one commit
catalogue.py   main's list of the branches
branch.py      the files of a branch, fetched one by one where they are needed
"""
