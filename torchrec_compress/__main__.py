"""`python -m torchrec_compress` is the command line."""

from torchrec_compress.cli import main

if __name__ == "__main__":
    main()
