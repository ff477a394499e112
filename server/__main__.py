from carpool.server.cli import main

main()
