"""`lorayard bench`: the speed of the engine on models that it makes itself."""
