"""From files to arrays: images, records, splits, tiles, augmentation and corruption."""
