"""A student on disk and on the Hub: folders that plain diffusers loads, their records and cards."""
