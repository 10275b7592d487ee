//! f32 slices as little-endian bytes, with as few copies as safe code allows.
//!
//! Sending costs none: the vector itself becomes the [`Bytes`]. Receiving costs one, because a payload has any
//! alignment inside its message, and because a small slice would keep the whole message alive.

use std::sync::Arc;

use bytes::Bytes;

/// The elements as little-endian bytes.
pub fn into_bytes(values: Vec<f32>) -> Bytes {
    #[cfg(target_endian = "little")]
    {
        struct Owner(Vec<f32>);
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        Bytes::from_owner(Owner(values))
    }
    #[cfg(target_endian = "big")]
    {
        values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into()
    }
}

/// The same of elements that are shared, which stay as long as the bytes.
pub fn shared_bytes(values: &Arc<Vec<f32>>) -> Bytes {
    #[cfg(target_endian = "little")]
    {
        struct Owner(Arc<Vec<f32>>);
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        Bytes::from_owner(Owner(Arc::clone(values)))
    }
    #[cfg(target_endian = "big")]
    {
        into_bytes(values.to_vec())
    }
}

/// Puts the elements behind what is there, as little-endian bytes.
pub(crate) fn extend_bytes(bytes: &mut Vec<u8>, values: &[f32]) {
    #[cfg(target_endian = "little")]
    bytes.extend_from_slice(bytemuck::cast_slice(values));
    #[cfg(target_endian = "big")]
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// The elements of little-endian bytes; bytes after the last whole element are left out.
pub fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bytes_are_little_endian() {
        assert_eq!(into_bytes(vec![1.0, -2.5])[..], [0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0]);
        assert!(into_bytes(vec![]).is_empty());
    }

    #[test]
    fn sending_copies_nothing() {
        let values = vec![1.0, 2.0];
        let address = values.as_ptr() as usize;
        if cfg!(target_endian = "little") {
            assert_eq!(into_bytes(values).as_ptr() as usize, address);
            let shared = Arc::new(vec![3.0]);
            let bytes = shared_bytes(&shared);
            assert_eq!((bytes.as_ptr() as usize, bytes.len()), (shared.as_ptr() as usize, 4));
        }
    }

    proptest! {
        #[test]
        fn every_bit_pattern_returns_at_any_alignment(bits in proptest::collection::vec(any::<u32>(), 0..50), shift in 0..8_usize) {
            let sent = into_bytes(bits.iter().map(|b| f32::from_bits(*b)).collect());
            let mut message = vec![0; shift];
            message.extend_from_slice(&sent);
            let received: Vec<u32> = from_bytes(&message[shift..]).iter().map(|v| v.to_bits()).collect();
            prop_assert_eq!(received, bits);
        }
    }
}
