from tpgptq_convert.cli import main

main()
