from kantha.cli.main import main

main()
