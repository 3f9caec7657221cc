"""From sound to features; never wakes a device."""
