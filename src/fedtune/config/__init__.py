"""The run's settings: a frozen protocol, a TOML file and the command line make one validated `Config`."""

from fedtune.config.load import Settings, load, parse_assignment
from fedtune.config.protocol import Protocol, protocol_names, read_protocol
from fedtune.config.schema import Config

__all__ = ["Config", "Protocol", "Settings", "load", "parse_assignment", "protocol_names", "read_protocol"]
