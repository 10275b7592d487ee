//! What `attnd explain` shows: which part of a call it asks for, and what it makes of the answer.

pub mod one_element;
pub mod part;
pub mod tables;
pub mod views;
pub mod words;
