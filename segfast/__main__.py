from segfast.cli import main

main()
