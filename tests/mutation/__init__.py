"""Would the tests notice? Small wrong changes to the code, each run against the tests that should see it.

    python -m tests.mutation [--only NAME] [--blind]

A copy of the tree is changed, one mutant at a time; the tree itself is not touched.
"""
