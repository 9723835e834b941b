"""What models cost on devices nobody has at hand: architectures, devices, and profiles composed of both."""
