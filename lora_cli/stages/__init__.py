"""The five stages: one file, one public `run`; a leading underscore marks a part of a stage."""
