"""Chaos: commands are killed, stopped, starved and lied to, given again until they are done, and their results compared.

An episode is one command line, disturbed. `command` runs it, `stand` knows what it gives undisturbed, `episode` judges what
became of it. The faults: `signals`, `damage`, `disks`, `pairs`, `stores`, `network`; `bench` plays and counts them. Only the
command line is used, as a user would, and the names of a run's folder.
"""
