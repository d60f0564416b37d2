"""The methods: one public file each, its name the method's, its dataclass `METHOD`."""
