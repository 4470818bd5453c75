"""``python -m cli`` is ``registry``."""

from cli.main import main

main()
