"""Reads the logs of serving engines, gateways and tracing tools into prompts."""
