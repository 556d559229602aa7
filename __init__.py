"""StereoVLA: a robot policy that sees with two eyes, for the Hugging Face Hub.

`stereovla --help` lists the commands.
"""

__version__ = "0.1.0"
