"""The fixed laboratory: everything that decides a result and that an experiment may not edit."""
