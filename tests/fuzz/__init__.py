"""A study: what the readers of flexgs do with damaged, lying and foreign files. python -m tests.fuzz
--help"""
