"""What the registry promises when things break: processes that are killed.

victims.py     a process that is killed, after a time or at a call of the operating system
kills.py       the loop that kills, checks and counts
shelf.py       a registry whose content is checked past the services
publishing.py, composing.py     what is killed; each knows what must hold afterwards
"""
