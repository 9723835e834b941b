"""`heliosim calibrate tune-exits`: exit heads for any OPT or Llama checkpoint, its backbone frozen and untouched."""
