"""What every registered optimizer has to satisfy; the tests take their methods from the registry."""
