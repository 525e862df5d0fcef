"""Agents that are ready to run: `aios-run -m libaios.agents.react "What is 37 * 91?"`."""
