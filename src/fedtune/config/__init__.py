"""The run's settings: a frozen protocol, a TOML file and the command line make one `Config`.

What is loaded for use goes through `fedtune.settings.load`, which also checks names and combinations.
"""

from fedtune.config.load import Settings, parse_assignment
from fedtune.config.protocol import Protocol, protocol_names, read_protocol
from fedtune.config.schema import Config

__all__ = ["Config", "Protocol", "Settings", "parse_assignment", "protocol_names", "read_protocol"]
